"""Modules that a run's YAML names and that register objectives, in processes of their own: a registry keeps what it was given."""

import subprocess
import sys
import textwrap

import yaml

from tests.distributed.tiny_run import tiny_config

PLUGIN = """
from rcm_megatron.registries import OBJECTIVES
from rcm_megatron.objectives.base import Objective

class Echo(Objective):
    name, roles, trains = "echo", ("student",), "student"

OBJECTIVES.register("echo", Echo())
"""
LOAD = """
import sys
from rcm_megatron.config import ConfigError, load_config
try:
    run = load_config(sys.argv[1], sys.argv[2:], world_size=1)
    print(run.objectives_used, run.roles, run.plugins, "torch" in sys.modules)
except ConfigError as error:
    sys.exit(str(error))
"""


def load(folder, plugins, *overrides):
    given = tiny_config(folder) | {"plugins": plugins}
    given["networks"] = {"student": given["networks"]["student"]}
    given["stages"] = [{"name": "e", "steps": 2, "losses": {"echo": 1.0}}]
    (folder / "run.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    (folder / "my_plugin.py").write_text(PLUGIN)
    (folder / "broken_plugin.py").write_text("1 / 0")
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + textwrap.dedent(LOAD)
    argv = [sys.executable, "-c", program, str(folder / "run.yaml"), *overrides]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_a_plugin_is_imported_before_the_rest_is_read(tmp_path):
    done = load(tmp_path, ["my_plugin"])
    assert done.stdout == "('echo',) ('student',) ('my_plugin',) False\n", done.stderr


def test_what_cannot_be_imported_is_named_with_its_reason(tmp_path):
    done = load(tmp_path, ["no_such_plugin", "broken_plugin"], "trainer.log_evry=2")
    for expected in (
        "plugins.0=no_such_plugin cannot be imported (ModuleNotFoundError",
        "plugins.1=broken_plugin cannot be imported (ZeroDivisionError: division by zero)",
        "stages.0.losses.echo: unknown key",
        "trainer.log_evry: unknown key",
    ):
        assert expected in done.stderr


def test_a_name_is_given_once(tmp_path):
    (tmp_path / "again.py").write_text(PLUGIN.replace('"echo"', '"scm"'))
    done = load(tmp_path, ["again"])
    assert "UserError: objective 'scm' is there already; give yours another name" in done.stderr
