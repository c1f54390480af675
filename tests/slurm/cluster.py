"""A real SLURM on this machine: munged, slurmctld and two slurmd ("nodes") in a folder of their own, on free ports.

Needs root and Debian's packages, which it installs. Every process it starts, or SLURM starts for it, carries the path of this cluster's
slurm.conf in its environment: that is how `stop` finds what a failed test has left.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

NODES = ("node0", "node1")
PATH = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"
"""Daemons stand where not every root's PATH looks."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser=root
SlurmdUser=root
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/task_prolog
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
MpiDefault=none
SlurmdTimeout=20
KillWait=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2
NodeName=node0 NodeHostname=localhost Port={port0} CPUs=4 RealMemory=8000
NodeName=node1 NodeHostname=localhost Port={port1} CPUs=4 RealMemory=8000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def why_not() -> str | None:
    """Why there can be no SLURM here; None if there can."""
    if os.geteuid() != 0:
        return "needs root, to install and to run SLURM's daemons"
    if not _missing():
        return None
    if not shutil.which("apt-get"):
        return "needs slurmctld, slurmd and munged, or Debian's apt-get to install them"
    _install()
    return f"apt-get could not install slurm-wlm and munge: {', '.join(_missing())} missing" if _missing() else None


def _missing() -> list[str]:
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


def _install() -> None:
    """RUNLEVEL=1 keeps the packages from starting services of their own."""
    environment = os.environ | {"PATH": PATH, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]
    for command in (install, ["apt-get", "update"], install):
        if _missing():
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=600, check=False)


class Cluster:
    """Start with `with Cluster(folder) as slurm`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.processes: dict[str, subprocess.Popen] = {}

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _start(self) -> None:
        for name in ("munge", "state"):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        prolog = self.folder / "task_prolog"
        prolog.write_text(
            '#!/bin/sh\nif [ "$SLURMD_NODENAME" = node1 ] && [ -n "$NODE1_PYTHONPATH" ]; then\n'
            '    echo "export PYTHONPATH=$NODE1_PYTHONPATH:$PYTHONPATH"\nfi\n'
        )
        prolog.chmod(0o755)
        ctld_port, port0, port1 = _free_ports(3)
        host = socket.gethostname().split(".")[0]
        settings = {"host": host, "folder": self.folder, "ctld_port": ctld_port, "port0": port0, "port1": port1}
        self.conf.write_text(CONFIG.format(**settings))
        munge = [f"--{name}-file={self.folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "munged", "--foreground", f"--socket={self.folder}/munge/socket", *munge)
        wait_for("munged's socket", lambda: (self.folder / "munge" / "socket").exists(), 30, self.state)
        self._daemon("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.conf))
        for node in NODES:
            self.start_node(node)
        wait_for(
            "both nodes",
            lambda: self.run("sinfo", "-h", "-o", "%D %T", check=False).strip() == "2 idle",
            90,
            self.state,
        )

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-f", str(self.conf), "-N", node)

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("a") as output:
            self.processes[name] = subprocess.Popen(
                command,
                env=os.environ | {"PATH": PATH, "SLURM_CONF": str(self.conf), "TEST_NODE": name},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill_node(self, node: str) -> None:
        """As if its power had gone: its slurmd, its steps and their processes, at once."""
        doomed = self._processes(f"TEST_NODE={node}") | self._processes(f"SLURMD_NODENAME={node}")
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.processes[node].wait()

    def stop(self) -> None:
        """Nothing of this cluster runs afterwards."""
        for _ in range(50):
            pids = self._processes("")
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self.processes.values():
                process.poll()
            if not pids:
                return
            time.sleep(0.1)
        raise RuntimeError(f"processes of {self.conf} survive: {pids}")

    def _processes(self, setting: str) -> set[int]:
        """Those with this cluster's slurm.conf and `setting` in their environment; zombies have none."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    environment = (entry / "environ").read_bytes().split(b"\0")
                    if f"SLURM_CONF={self.conf}".encode() in environment and (
                        not setting or setting.encode() in environment
                    ):
                        found.add(int(entry.name))
        return found

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **settings: str) -> str:
        """The output of a command that sees this cluster; `settings`: more of its environment."""
        done = subprocess.run(
            command,
            env=os.environ | {"PATH": PATH, "SLURM_CONF": str(self.conf)} | settings,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stderr}")
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """scontrol's fields of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def finish(self, job: str, seconds: float = 400) -> dict[str, str]:
        """Wait for a job's end and return its fields. SLURM holds a requeued job back for two minutes, for the sake of credentials that
        it has revoked; here for three seconds."""
        pending = {}

        def ended():
            fields = self.job(job)
            if fields["JobState"] == "PENDING":
                since = pending.setdefault(fields["Restarts"], time.monotonic())
                if fields["Restarts"] != "0" and time.monotonic() > since + 3:
                    self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            return fields if fields["JobState"] in FINAL else None

        return wait_for(f"the end of job {job}", ended, seconds, self.state)

    def state(self) -> str:
        """For a failure's message."""
        logs = [f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.[lo][ou][gt]"))]
        return "\n".join([self.run("squeue", check=False), self.run("sinfo", "-N", "-l", check=False), *logs])


def wait_for(what: str, condition, seconds: float, context=lambda: ""):
    """What `condition` returns once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s\n{context()}")
        time.sleep(0.2)
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
