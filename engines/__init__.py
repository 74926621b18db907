"""Run time: from an engine directory to tokens."""

import os

# Threads of OpenMP that wait spin by default. With other work on the processor they spin away each other's time, and a round
# takes two to four times as long. This must be set before torch loads the library; what the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
