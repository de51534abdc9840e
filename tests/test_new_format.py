"""A format made for this test alone: with one line in the table, everything knows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jobs.formats

# The process reads the table with one more line, as if it stood in the file.
CODE = """
import sys, types
from pathlib import Path

path = Path(sys.argv[1])
line = 'FORMATS: dict[str, Format] = {\\n    "bmp": Format("image/bmp", picture=bmp),\\n'
source = path.read_text().replace("FORMATS: dict[str, Format] = {\\n", line)
encoder = "def bmp(pixels, manifest, *, px): return b'BM'\\n\\n"
source = source.replace("class PictureEncoder", encoder + "class PictureEncoder")
module = types.ModuleType("jobs.formats")
sys.modules["jobs.formats"] = module
exec(compile(source, str(path), "exec"), module.__dict__)

import numpy as np
from app import documents, negotiation, outputs
from app.main import create_app
from jobs.kinds.generate import GenerateSpec

assert GenerateSpec.model_validate({"format": "bmp"}).format == "bmp"
assert negotiation.accepted("image/bmp") == "bmp"
schema = create_app().openapi()
image = schema["paths"]["/jobs/{job_id}/images/{index}.{suffix}"]["get"]
assert "bmp" in image["parameters"][2]["schema"]["enum"]
assert "image/bmp" in image["responses"]["200"]["content"]
assert "image/bmp" in schema["paths"]["/generate"]["post"]["responses"]["200"]["x-accept"]
assert outputs.file_response(b"BM", "bmp", cache="no-cache").media_type == "image/bmp"
print("known everywhere")
"""


def test_a_new_format_is_one_line() -> None:
    path = str(Path(jobs.formats.__file__))
    done = subprocess.run(
        [sys.executable, "-c", CODE, path], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "known everywhere\n", done.stderr
