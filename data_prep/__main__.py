"""What prepare.sh runs: an interruption ends it in one line, while Python still imports too."""

import sys

try:
    import prepare

    prepare.main()
except KeyboardInterrupt:
    print("\nxmoe_fairseq: interrupted: run the same command again to go on", file=sys.stderr)
    sys.exit(130)
