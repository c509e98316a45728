"""Mixture-of-experts and vocabulary kernels, each beside the plain torch form it must equal."""
