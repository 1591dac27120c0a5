"""`python -m cramlit`: the command, for shells without it on their path, and for torchrun"""
import sys

from cramlit.running.command import main

sys.exit(main())
