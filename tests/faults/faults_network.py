"""Two network namespaces joined by a cable that loses, refuses, slows and changes packets (`nft`, `tc`); needs root."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Literal

Direction = Literal["forward", "backward"]  # from prefill, and to it
TABLE = """
flush ruleset
table ip faults {
  chain out {
    type filter hook output priority 0; policy accept;
    %s
  }
  chain in {
    type filter hook input priority 0; policy accept;
    %s
  }
}
"""


def unavailable() -> str:
    """Why there are no network namespaces here; empty when there are."""
    if os.geteuid():
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "nft", "tc") if not shutil.which(tool)]:
        return f"not installed: {', '.join(missing)} (iproute2, nftables)"
    name = f"hocket-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    tried = subprocess.run(_within(name, "nft", "-f", "-"), input=TABLE % ("", ""), capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return f"nft does not work here: {tried.stderr.strip()}" if tried.returncode else ""


def _within(name: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", name, *command]


class Network:
    """One namespace for a prefill worker and one for a decode worker."""

    def __init__(self, number: int) -> None:
        self._names = [f"hocket-{os.getpid()}-{number}-{role}" for role in ("prefill", "decode")]
        self._devices = [f"hk{number}p", f"hk{number}d"]
        self.hosts = [f"10.77.{number}.1", f"10.77.{number}.2"]

    async def build(self) -> None:
        """It carries when this returns: UCX knows only the devices that do when it starts."""
        for name in self._names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        near, far = self._devices
        _run("ip", "-n", self._names[0], "link", "add", near, "type", "veth", "peer", far, "netns", self._names[1])
        for name, device, host in zip(self._names, self._devices, self.hosts, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{host}/24", "dev", device)
            _run(
                "ip", "-n", name, "link", "set", device, "gso_max_segs", "1", "up"
            )  # A rule sees packets as they travel.
        async with asyncio.timeout(10.0):
            for name, device in zip(self._names, self._devices, strict=True):
                while _read(name, device, "operstate") != "up":
                    await asyncio.sleep(0.02)

    def remove(self) -> None:
        for name in self._names:
            _run("ip", "netns", "delete", name)

    def wrap(self, role: int) -> Sequence[str]:
        """How to start a process there: 0 prefill, 1 decode."""
        return _within(self._names[role])

    # Faults.

    def silence(self, *directions: Direction) -> None:
        self._rule("drop" if "forward" in directions else "", "drop" if "backward" in directions else "")

    def lose_large(self) -> None:
        """Nothing of a bulk transfer arrives, and everything small does: a path whose MTU is not what it says."""
        self._rule("ip length > 1000 drop", "")

    def reset(self) -> None:
        self._rule(*["meta l4proto tcp reject with tcp reset"] * 2)

    def corrupt(self, packets_bytes: int) -> None:
        """Change a byte of each packet of KV that leaves, the checksum too, until so many bytes have left."""
        self._rule(f"ip length > 1000 quota until {packets_bytes} bytes meta l4proto tcp @th,1600,8 set 0x41", "")

    def has_corrupted(self) -> bool:
        shown = _within(self._names[0], "nft", "list", "ruleset")
        return " used " in subprocess.run(shown, check=True, capture_output=True, text=True).stdout

    async def has_sent(self, nbytes: int) -> None:
        """Wait until the prefill side has sent so much since the network was built."""
        while int(_read(self._names[0], self._devices[0], "statistics/tx_bytes")) < nbytes:
            await asyncio.sleep(0.02)

    def slow(self, bits_per_s: int) -> None:
        for name, device in zip(self._names, self._devices, strict=True):
            limits = ("rate", f"{bits_per_s}bit", "burst", "16kb", "latency", "400ms")
            _run(*_within(name, "tc", "qdisc", "replace", "dev", device, "root", "tbf", *limits))

    def heal(self) -> None:
        _run(*_within(self._names[0], "nft", "flush", "ruleset"))
        for name, device in zip(self._names, self._devices, strict=True):
            command = _within(name, "tc", "qdisc", "del", "dev", device, "root")
            subprocess.run(command, capture_output=True)  # There may be none.

    def _rule(self, out: str, into: str) -> None:
        command = _within(self._names[0], "nft", "-f", "-")
        subprocess.run(command, input=TABLE % (out, into), check=True, capture_output=True, text=True)


def _read(name: str, device: str, what: str) -> str:
    shown = _within(name, "cat", f"/sys/class/net/{device}/{what}")
    return subprocess.run(shown, check=True, capture_output=True, text=True).stdout.strip()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
