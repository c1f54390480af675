"""`rcm convert` in this process."""

from rcm_megatron.checkpoint import convert as conversion
from rcm_megatron.requests import ConvertRequest


def convert(source, target, to, **options):
    """The configuration of the network; ``options`` as of the command."""
    request = ConvertRequest(source=str(source), target=str(target), to=to, **options)
    return conversion.convert(request, progress=False)
