"""One thin module per DVC stage: read params, call one function of the library.

DVC runs a stage with whatever ``python3`` comes first on the PATH. Where that one lacks the project's
packages and ``.venv`` has them, the stage goes on in ``.venv``, so that ``.venv/bin/dvc repro`` works
whether or not the environment is activated.
"""

import importlib.util
import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PYTHON = _ROOT / ".venv" / "bin" / "python"

if importlib.util.find_spec("pydantic") is None and _PYTHON.exists() and "QKT_STAGE_ENV" not in os.environ:
    os.environ["QKT_STAGE_ENV"] = str(_PYTHON)
    os.execv(_PYTHON, [str(_PYTHON), "-m", sys.orig_argv[sys.orig_argv.index("-m") + 1], *sys.argv[1:]])
