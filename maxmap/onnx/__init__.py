"""ONNX: a forward pass as a graph (`lower`), files of such graphs (`export`), and running them (`session`)."""
