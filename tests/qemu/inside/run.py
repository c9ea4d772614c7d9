"""In a guest: `python run.py PROGRAM…` runs the checks of programs of this folder."""

import sys

import checking

checking.main(sys.argv[1:])
