"""Pages as a headless browser shows them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium, which opens the page")


def picture(page, width, height, folder):
    """A page of HTML -> int [height, width, 3], 255 is white."""
    from matplotlib.image import imread

    shot = Path(folder, "shot.png")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder}/browser", f"--screenshot={shot}", f"--window-size={width},{height}"]
    subprocess.run([*command, f"file://{Path(page).absolute()}"], check=True, timeout=120, capture_output=True)
    shown = (imread(shot)[:, :, :3] * 255).round().astype(int)
    assert shown.shape == (height, width, 3)
    return shown


def check_readable(page, folder, width=1100, height=900):
    """There is something on the page, from its top on, and nothing is wider than it."""
    inked = (picture(page, width, height, folder) < 225).any(2)  # not the backgrounds
    assert 0.005 < inked.mean() < 0.4
    assert inked[:200].any()
    assert not inked[:, -10:].any()
