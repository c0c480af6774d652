"""`albef_ds data …` in a process of its own, to be killed by a test."""

import argparse
import sys

if __name__ == "__main__":
    from albef_ds.data.commands import add_commands

    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args()
    sys.exit(args.run(args))
