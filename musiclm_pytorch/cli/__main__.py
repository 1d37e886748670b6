import sys

from musiclm_pytorch.cli.entry import main

sys.exit(main())
