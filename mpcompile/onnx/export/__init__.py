"""From torch graphs to ONNX models."""
