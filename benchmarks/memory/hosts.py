"""Run a command on several hosts that are network namespaces of this machine, joined by a switch.

``sudo python -m benchmarks.memory.hosts --hosts 3 -- -m dpo_cli train --data /abs/pairs.jsonl …``: each host has an
address, a folder and a home of its own, and starts the launcher as docs/scale.md says. Linux, root and iproute2.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PREFIX = "dpo"
ADDRESS = "10.77.0.{}"
PORT = 29500


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def possible() -> bool:
    """Whether namespaces can be made here."""
    try:
        ip("netns", "add", f"{PREFIX}-try")
        ip("netns", "del", f"{PREFIX}-try")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextmanager
def network(count: int) -> Iterator[list[str]]:
    """Namespaces ``dpo-PID-0``, …, each with ``eth0`` at 10.77.0.1, … and no way out; they go when the block ends."""
    names = [f"{PREFIX}-{os.getpid()}-{host}" for host in range(count)]
    switch = f"{PREFIX}-{os.getpid()}-switch"
    made = []
    try:
        for name in [switch, *names]:
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for host, name in enumerate(names):
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{host}", "netns", switch)
            ip("-n", switch, "link", "set", f"port{host}", "master", "br0", "up")
            ip("-n", name, "addr", "add", ADDRESS.format(host + 1) + "/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


def run(
    count: int, command: Sequence[str], folder: Path, environment: Mapping[str, str], ranks: int = 1
) -> list[tuple[int, str]]:
    """Start ``command`` on every host with torchrun; exit code and stderr of each."""
    with network(count) as names:
        running = []
        for host, name in enumerate(names):
            home = folder / f"host-{host}"
            home.mkdir(parents=True, exist_ok=True)
            launcher = ["--nnodes", str(count), "--node-rank", str(host), "--nproc-per-node", str(ranks)]
            launcher += ["--master-addr", ADDRESS.format(1), "--master-port", str(PORT)]
            words = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *launcher, *command]
            own = dict(environment) | {"HOME": str(home), "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
            running.append(subprocess.Popen(words, cwd=home, env=own, stderr=subprocess.PIPE, text=True))
        try:
            told = [each.communicate(timeout=300)[1] for each in running]
        finally:
            for each in running:
                each.kill()
    return [(each.returncode, text) for each, text in zip(running, told, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1, help="on each host")
    parser.add_argument("--folder", type=Path, default=Path("hosts"), help="where each host has its folder")
    parser.add_argument("command", nargs="+", help="what torchrun starts: -m dpo_cli train …")
    given = parser.parse_args()
    if not possible():
        parser.error("no network namespaces here: they need root, iproute2 and a kernel that allows them")
    results = run(given.hosts, given.command, given.folder.absolute(), os.environ, given.ranks)
    for host, (code, told) in enumerate(results):
        print(f"--- host {host}: exit code {code}", told, sep="\n", file=sys.stderr)
    return max(code != 0 for code, _ in results)


if __name__ == "__main__":
    sys.exit(main())
