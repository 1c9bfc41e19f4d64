"""Keep what the answers ask for: the licence, and the files that only some projects have."""

import json
import shutil
from pathlib import Path

answers = json.loads(r"""{{ cookiecutter|tojson }}""")
package = Path("src", answers["package"])

Path("licences", f"{answers['licence']}.txt").rename("LICENSE")
shutil.rmtree("licences")
if answers["trainer"] != "slurm":
    Path("train.sbatch").unlink()
if answers["task"] != "own":
    (package / "example.py").unlink()
