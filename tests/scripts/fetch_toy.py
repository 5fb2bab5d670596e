"""Fetch a toy checkpoint by its name, in a process of its own: fetch_toy.py ADDRESS FOLDER_OF_FILES NAME"""

import sys
from pathlib import Path

from dino_hf.conversion.by_name import fetch
from published_toys import PROJECTS, add_toy_rows

if __name__ == "__main__":
    address, folder, name = sys.argv[1:]
    files = {f"/{project}/toy.pth": Path(folder, f"{project}.pth").read_bytes() for project in PROJECTS}
    add_toy_rows(dict.__setitem__, files, address)
    print("fetching", flush=True)
    print(fetch(name), flush=True)
