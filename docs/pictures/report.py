"""Draw report.png: the report's page of the demo's model in headless Chromium (needs Chromium and Pillow).

python docs/pictures/report.py
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from mpcompile import mpcompile
from mpcompile.tools.gpt import ByteGPT

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from chromium import Chromium  # noqa: E402


def draw(width: int = 1400, height: int = 820) -> None:
    """Write the picture beside this file."""
    text = torch.randint(0, 256, (8, 257))
    report = mpcompile(ByteGPT(), "low=bf16,device=cuda").report(text)
    with tempfile.TemporaryDirectory() as folder, Chromium(Path(folder) / "profile") as browser:
        page, shot = Path(folder) / "report.html", Path(folder) / "report.png"
        report.to_html(page)
        browser.size(width, height)
        browser.open(page, "#node=add")
        browser.run(
            "for (const twist of document.querySelectorAll('#tree .twist')) if (twist.textContent === '▸') twist.click()"
        )
        browser.frames()
        browser.picture(shot)
        picture = Image.open(io.BytesIO(shot.read_bytes())).convert("RGB").quantize(200, dither=Image.Dither.NONE)
        picture.save(HERE / "report.png", optimize=True)


if __name__ == "__main__":
    draw()
