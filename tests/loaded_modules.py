"""Train as asked, then print the names of all modules that this process has loaded."""

import sys

from trainer.train import main

if __name__ == "__main__":
    try:
        main()
    finally:
        print(" ".join(sorted(sys.modules)))
