"""The Textual console: screens and widgets over a Source; the only importer of textual."""

import os

# Textual waits so many milliseconds for what may follow ESC, the begin of many keys; it reads this when it is imported,
# and its own 100 would be felt each time one goes back.
os.environ.setdefault("ESCDELAY", "25")
