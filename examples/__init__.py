"""Runnable studies on handwritten digits: `python -m examples.simple_linear`, and so on; each takes --quick.

They need `pip install "panther-compress[examples]"`, and are run from a checkout.
"""
