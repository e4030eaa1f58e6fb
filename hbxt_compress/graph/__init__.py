"""Torch modules to ONNX files: capture, passes, writing, and the rules that a graph must keep."""
