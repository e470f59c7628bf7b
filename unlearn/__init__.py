"""Fine-tuning and unlearning of Qwen2.5-VL models on MedForget, with TRL."""

import os


# OpenMP's threads wait by spinning unless told otherwise before torch is loaded: with another job on the same cores a
# step of the tiny model then takes three times as long, and on idle ones it takes no less.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
