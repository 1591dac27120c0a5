"The `cramlit` command as `python -m cramlit`, which is what torchrun starts"
import sys

from cramlit.running.command import main

if __name__ == '__main__': sys.exit(main())
