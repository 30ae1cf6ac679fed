"""The operators as TensorRT plugins.

``declaration`` says what each plugin's kernel takes, ``kernels`` has the kernels, ``compile`` makes PTX of them;
``plugins`` registers them with TensorRT, ``onnx_plugins`` those that an ONNX file of opset 27 asks for by name,
``onnx_nodes`` puts them into a ``portable`` file, and ``converters`` into torch-tensorrt. The last four need full
TensorRT; nothing of it is imported before they are used.
"""
