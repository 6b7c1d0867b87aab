"""Stand in for the settings module where a file of this folder is run: only then is the folder,
and not the root, where Python looks first; `import config` ends the run in a sentence."""
import os
import sys

sys.stderr.write(f"error: {os.path.basename(sys.argv[0])} is imported by the scripts and "
                 "cannot be run: README.md lists what to run\n")
sys.exit(2)
