"""A terminal driver that writes ASCII alone, for terminals that do not show UTF-8."""

import locale

from rich.cells import cell_len
from textual.drivers.linux_driver import LinuxDriver

_ASCII = {
    **dict.fromkeys("─━═▔▁▂▃", "-"),
    **dict.fromkeys("│┃║▏▕▎▊", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯╔╗╚╝", "+"),
    **dict.fromkeys("█▉▇▆▅▄▌▐▋▍", "#"),
    **dict.fromkeys("·•", "."),
    "…": "~",
    "–": "-",
    "—": "-",
}


def shows_utf8() -> bool:
    """Whether the locale's encoding is UTF-8, also if Python uses UTF-8 regardless of it."""
    return locale.getencoding().upper().replace("-", "") == "UTF8"


def to_ascii(text: str) -> str:
    """`text` with each other character replaced by as many ASCII characters as it has cells."""
    if text.isascii():
        return text
    return "".join(char if char.isascii() else _ASCII.get(char) or "?" * cell_len(char) for char in text)


class AsciiDriver(LinuxDriver):
    """The driver of Linux and macOS, with `to_ascii` for what it writes."""

    def write(self, data: str) -> None:
        """Write to the terminal."""
        super().write(to_ascii(data))
