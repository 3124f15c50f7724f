"""Whether tests covered enough lines of every module that pyproject.toml names for coverage.

python tools/covered.py REPORT.json PERCENT
"""

import json
import sys
import tomllib
from pathlib import Path


def main(report: str, least: float) -> int:
    settings = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["tool"]["coverage"]["run"]
    files = json.loads(Path(report).read_text("utf-8"))["files"]
    below = 0
    for name in settings["include"]:
        # a module that no test imported is not in the report
        percent = files[name]["summary"]["percent_covered"] if name in files else 0.0
        missing = ", ".join(map(str, files[name]["missing_lines"])) if name in files else "all"
        print(f"{percent:6.1f} %  {name:<40}" + (f"without {missing}" if missing else ""))
        below += percent < least
    if below:
        print(f"{below} of {len(settings['include'])} modules are covered by less than {least:g} %")
    return below > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
