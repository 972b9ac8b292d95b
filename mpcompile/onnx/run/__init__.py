"""ONNX Runtime: sessions and calibration."""
