import sys

from maskdp.cli import main

sys.exit(main())
