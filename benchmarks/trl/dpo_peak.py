"""Run the `dpo` command and keep writing the device's peak memory in MiB to the file named by the first argument."""

import sys
import threading
import time
from pathlib import Path

import torch

from dpo_cli.cli.app import main


def watch(file: Path) -> None:
    while torch.cuda.is_available():
        if torch.cuda.is_initialized():
            file.write_text(f"{torch.cuda.max_memory_allocated() / 2**20:.0f}\n")
        time.sleep(0.2)


if __name__ == "__main__":
    threading.Thread(target=watch, args=(Path(sys.argv.pop(1)),), daemon=True).start()
    main()
