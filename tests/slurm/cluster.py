"""Starts a private, real Slurm on this one host: virtual nodes with fake GPUs, with or without accounting.

    python tests/slurm/cluster.py install     install Debian's packages, or say why not (exit code 3)

Everything lies in one folder: munge key, sockets, ports, slurm.conf, the database. No systemd, cgroups or root are
needed; as root, jobs run as root. The first lines of each method say which surprise of Slurm 22.05 it avoids.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
ACCOUNTING_PACKAGES = ("slurmdbd", "mariadb-server-core", "mariadb-client-core")
SEARCH_PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
PURPOSE = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
ACCOUNTING_PURPOSE = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server-core", "mariadb": "mariadb-client-core"}
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=20
CredType=cred/munge
{listen}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=1,batch_sched_delay=0,sched_min_interval=10000
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=300
KillWait=20
InactiveLimit=0
CompleteWait=0
OverTimeLimit=0
SlurmctldTimeout=30
SlurmdTimeout=30
JobRequeue=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
PlugStackConfig=/dev/null
{accounting}
{nodes}
PartitionName=gpu Nodes=n[1-{count}] Default=YES MaxTime=INFINITE DefaultTime=10 DefMemPerCPU=500 State=UP
PartitionName=urgent Nodes=n[1-{count}] MaxTime=INFINITE DefaultTime=10 DefMemPerCPU=500 State=UP PriorityTier=10
"""
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge/socket
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment"""
DATABASE = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
DebugLevel=info
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
CommitDelay=1
"""


def why_not(*, accounting: bool) -> str | None:
    """Why no Slurm can be started here; None where it can."""
    wanted = PURPOSE | (ACCOUNTING_PURPOSE if accounting else {})
    missing = [package for program, package in wanted.items() if shutil.which(program, path=SEARCH_PATH) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}): python tests/slurm/cluster.py install"
    return None


def install() -> str | None:
    """Install what is missing from Debian's packages; returns why that is not possible here, None if all is there."""
    if why_not(accounting=True) is None:
        return None
    if shutil.which("apt-get") is None:
        return "Slurm for the tests comes from Debian's packages, and this system has no apt-get"
    if os.geteuid() != 0:
        return "installing Slurm for the tests needs root"
    policy = Path("/usr/sbin/policy-rc.d")  # asked by the packages' scripts whether they may start their daemons
    if not policy.exists():
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    else:
        policy = None
    try:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        packages = [*PACKAGES, *ACCOUNTING_PACKAGES]
        for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                return f"apt-get {command[0]} failed: {done.stderr.strip().splitlines()[-1:]}"
    finally:
        if policy is not None:
            policy.unlink()
    return why_not(accounting=True)


class Cluster:
    """A running Slurm; `stop` ends its jobs and daemons and removes its folder."""

    def __init__(self, *, accounting: bool, nodes: int = 2, gpus: int = 4, cpus: int = 16, memory_mb: int = 64000):
        # munge wants folders that all may enter, and sockets need short names: not pytest's folder
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        self.nodes, self.gpus, self._cpus, self._memory_mb = nodes, gpus, cpus, memory_mb
        self._accounting = accounting
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = _free_ports(2 + nodes)
        try:
            self._configure()
            self._start()
        except BaseException:
            self.stop()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """What a user of this cluster has in the environment."""
        return {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf"), "PATH": SEARCH_PATH}

    def run(self, *command: str) -> str:
        """Output of a Slurm command."""
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def kill_slurmd(self, node: str) -> None:
        """Kill a node's daemon with SIGKILL; the processes of its jobs live on."""
        daemon = self._daemons.pop(f"slurmd.{node}")
        daemon.kill()
        daemon.wait()

    def fail_node(self, node: str) -> None:
        """Kill a node's daemon and all processes of its jobs, as a loss of power does."""
        self.kill_slurmd(node)
        of_jobs = list(self._left_behind(node))
        keepers = {keeper for pid in of_jobs if (keeper := _ancestor(pid, "slurmstepd")) is not None}
        for pid in [*keepers, *of_jobs]:  # those first that would tell of the end of the others
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_slurmd(self, node: str) -> None:
        """Start a node's daemon, and wait until jobs can start there."""
        self._spawn(f"slurmd.{node}", ["slurmd", "-D", "-N", node])
        usable = ("idle", "mixed", "allocated")
        self._wait(
            f"slurmd.{node}", lambda: self.run("sinfo", "-hNp", "gpu", "-n", node, "-o", "%T").split()[0] in usable
        )

    def clear(self) -> None:
        """Cancel every job and wait until none is left."""
        for _ in range(300):
            ids = self.run("squeue", "-h", "-o", "%A").split()
            if not ids:
                return
            with suppress(RuntimeError):
                self.run("scancel", "--quiet", *ids)
            time.sleep(0.1)
        raise RuntimeError(f"jobs that do not end: {self.run('squeue')}")

    def stop(self) -> None:
        """End jobs, daemons and what jobs left behind."""
        with suppress(RuntimeError, subprocess.TimeoutExpired):
            self.clear()
        for pid in self._left_behind():  # without cgroups, a process that forked twice survives its job
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        for name in ("etc", "munge", "state", "log", "run", "dev", *(f"spool/n{i}" for i in self._numbers())):
            (self.folder / name).mkdir(parents=True)
        for index in range(self.gpus):  # Slurm asks stat() whether it is a device: a link to one will do
            (self.folder / "dev" / f"gpu{index}").symlink_to("/dev/null")
        (self.folder / "munge" / "key").touch(mode=0o600)
        (self.folder / "munge" / "key").write_bytes(os.urandom(1024))
        host = socket.gethostname().split(".")[0]
        # Loopback only where that is the host's address; elsewhere srun would listen on one and be called on another.
        loopback = False
        with suppress(OSError):
            loopback = socket.gethostbyname(host) == "127.0.0.1"
        listen = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if loopback else ""
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        names = {"host": host, "user": user, "folder": self.folder}
        nodes = "\n".join(
            f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={self._ports[1 + i]} CPUs={self._cpus} "
            f"RealMemory={self._memory_mb} Gres=gpu:h200:{self.gpus} State=UNKNOWN"
            for i in self._numbers()
        )
        accounting = "AccountingStorageType=accounting_storage/none"
        if self._accounting:
            accounting = ACCOUNTING.format(port=self._ports[1], **names)
            database = self.folder / "etc" / "slurmdbd.conf"
            database.touch(mode=0o600)
            database.write_text(DATABASE.format(port=self._ports[1], **names))
        (self.folder / "etc" / "slurm.conf").write_text(
            CONFIGURATION.format(
                port=self._ports[0], listen=listen, accounting=accounting, nodes=nodes, count=self.nodes, **names
            )
        )
        gpus = f"Name=gpu Type=h200 File={self.folder}/dev/gpu[0-{self.gpus - 1}]\n"
        (self.folder / "etc" / "gres.conf").write_text(f"AutoDetect=off\n{gpus}")
        # slurmd loads a cgroup plugin though nothing uses it; this one touches nothing, the others want systemd
        (self.folder / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _start(self) -> None:
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
        self._spawn("munged", ["munged", "--foreground", f"--socket={munge}/socket", *files])
        self._wait("munged", lambda: (munge / "socket").exists())
        if self._accounting:
            self._start_database()
        self._spawn("slurmctld", ["slurmctld", "-D"])
        self._wait("slurmctld", lambda: self.run("scontrol", "ping"))
        for i in self._numbers():
            self.start_slurmd(f"n{i}")
        self._wait("slurmctld", lambda: self.run("sinfo", "-hNp", "gpu", "-o", "%T").split() == ["idle"] * self.nodes)

    def _start_database(self) -> None:
        data, sock = self.folder / "mysql", self.folder / "run" / "my.sock"
        data.mkdir()
        user = ["--user=root"] if os.geteuid() == 0 else []
        make = ["mariadb-install-db", "--no-defaults", *user, f"--datadir={data}", "--skip-test-db", "--force"]
        make += ["--auth-root-authentication-method=normal", "--innodb-log-file-size=4M"]
        subprocess.run(make, env=os.environ | self.environment, capture_output=True, check=True)
        serve = ["mariadbd", "--no-defaults", *user, f"--datadir={data}", f"--socket={sock}", "--skip-networking"]
        serve += [f"--pid-file={self.folder}/run/mariadbd.pid", "--innodb-buffer-pool-size=32M"]
        serve += ["--innodb-flush-log-at-trx-commit=0", "--performance-schema=OFF", "--innodb-lock-wait-timeout=900"]
        self._spawn("mariadbd", serve)
        ask = ["mariadb", "--no-defaults", "-uroot", "-S", str(sock), "-e", "select 1"]
        self._wait("mariadbd", lambda: self.run(*ask))
        self._spawn("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(sock))
        self._wait("slurmdbd", lambda: self.run("sacctmgr", "-n", "show", "cluster") is not None)
        self.run("sacctmgr", "-i", "add", "cluster", "test")

    def _numbers(self) -> range:
        return range(1, self.nodes + 1)

    def _spawn(self, name: str, command: list[str], **extra: str) -> None:
        environment = os.environ | self.environment | extra
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_end_with_parent
            )

    def _wait(self, name: str, ready: Callable[[], object], limit_s: float = 60.0) -> None:
        deadline = time.monotonic() + limit_s
        while True:
            with suppress(RuntimeError):
                if ready():
                    return
            if self._daemons[name].poll() is not None or time.monotonic() > deadline:
                log = (self.folder / "log" / f"{name}.out").read_text()[-2000:]
                raise RuntimeError(f"{name} does not come up: {log}")
            time.sleep(0.05)

    def _left_behind(self, node: str | None = None) -> Iterator[int]:
        """Processes of jobs of this cluster, or of one of its nodes, by their environment."""
        mine = {f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()}
        mine |= {f"SLURMD_NODENAME={node}".encode()} if node is not None else set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                variables = path.read_bytes().split(b"\0")
                if mine.issubset(variables) and any(name.startswith(b"SLURM_JOB_ID=") for name in variables):
                    yield int(path.parent.name)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _ancestor(pid: int, name: str) -> int | None:
    """The nearest process above `pid` with that name."""
    while pid > 1:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        if fields[fields.index("(") + 1 : fields.rindex(")")] == name:
            return pid
        pid = int(fields.rpartition(")")[2].split()[1])
    return None


def _end_with_parent() -> None:
    """In a new daemon: a session of its own, and an end when the tests are killed."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        sys.exit(__doc__)
    if reason := install():
        print(f"no Slurm for the tests: {reason}", file=sys.stderr)
        sys.exit(3)
