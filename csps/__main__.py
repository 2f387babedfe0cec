"""python -m csps"""

from csps.cli import main

main()
