"""The versions that ds_llmpq runs with, on one line; or what to install for others.

python scripts/versions_in_use.py             name version, ...
python scripts/versions_in_use.py --outside   those outside the tested ranges, one a line
python scripts/versions_in_use.py --allowed   requirement lines with their ranges
python scripts/versions_in_use.py --any       requirement lines without
"""

import sys
from importlib import metadata

from ds_llmpq.errors import UserError
from ds_llmpq.versions import EXTRAS, REQUIREMENTS, check_version, format_requirements

TOLD = ("torch", "transformers", "deepspeed", "hqq", "openvino", "numpy", "lm_eval")


def main(option: str | None) -> None:
    wanted = REQUIREMENTS | EXTRAS["dev"]
    if option == "--allowed":
        print(*format_requirements({name: wanted[name] for name in wanted if name != "torch"}), sep="\n")
    elif option == "--any":
        print(*(name for name in wanted if name != "torch"), sep="\n")
    elif option == "--outside":
        for name, versions in wanted.items():
            try:
                check_version(name, versions)
            except UserError as error:
                print(error)
    else:
        print(f"Python {sys.version.split()[0]}", *(f"{name} {metadata.version(name)}" for name in TOLD), sep=", ")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
