"""Nothing private in what is sent: serial numbers, names of machine and user, and paths are replaced by a word."""

from __future__ import annotations

import getpass
import os
import re
from typing import Any

from gpunvme.nvme.sysfs import Machine, list_controllers

_OF_NAMESPACES = ("wwid", "uuid", "nguid", "eui")
# A word this short is in every other line by chance.
_LEAST = 3


class Privacy:
    """Knows what is private on this machine, and replaces it.

    Parameters
    ----------
    machine
        Whose drives.
    directory
        The directory that steps make files in.
    serials
        Whether serial numbers and what is made of them may stay.
    """

    def __init__(self, machine: Machine, directory: str = "", *, serials: bool = False) -> None:
        words: dict[str, str] = {}
        if directory:
            words[os.path.abspath(directory)] = words[directory] = "DIRECTORY"
        words[os.uname().nodename] = "HOST"
        # Who became root by sudo is still somebody.
        for user in (_user(), os.environ.get("SUDO_USER", "")):
            words[os.path.expanduser(f"~{user}")] = "HOME"
            words[user] = "USER"
        if not serials:
            for word in _serials(machine):
                words[word] = "SERIAL"
        known = sorted((word for word in words if len(word) >= _LEAST and word != "root"), key=len, reverse=True)
        self._words = words
        self._pattern = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in known)) if known else None

    def text(self, text: str) -> str:
        """Return a text without what is private."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: self._words[match[0]], text)

    def of(self, value: Any) -> Any:
        """Return the same for whatever JSON can be made of."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.of(key): self.of(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.of(each) for each in value]
        return value


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def _serials(machine: Machine) -> list[str]:
    found = []
    for each in list_controllers(machine):
        where = f"/sys/bus/pci/devices/{each.function.address}/nvme/{each.name}"
        found += [each.serial, machine.read(f"{where}/subsysnqn")]
        for namespace in each.namespaces:
            found += [machine.read(f"/sys/class/block/{namespace.name}/{name}") for name in _OF_NAMESPACES]
    return [word for word in found if word]
