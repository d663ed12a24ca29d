"""Published configurations of Mixture-of-Experts models, and what this project does with each of them.

    python -m benchmarks.published_configs --work DIR

``configs/`` has one file a model: its name, where the values of its ``config.json`` come from, and the values that
decide what is built. Nothing in them is a weight.
"""
