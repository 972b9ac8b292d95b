"""Run an emitted graph: through Dynamo and Inductor, op by op, or on ONNX Runtime."""
