"""python -m reliability.fuzz"""

import sys

from reliability.fuzz.fuzzer import main

if __name__ == "__main__":
    sys.exit(main())
