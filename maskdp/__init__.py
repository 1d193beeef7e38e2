"""maskdp: train and publish action-recognition models on videos of people, safely."""

__version__ = "0.1.0"
