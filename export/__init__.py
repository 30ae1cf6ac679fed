"""Floor 6: a whole model becomes programs and artifacts, each compared with eager and described by a manifest."""

from gdn_ops.export.aoti import ExportResult, export_aoti
from gdn_ops.export.onnx import OnnxExport, export_onnx
from gdn_ops.export.parity import ParityError
from gdn_ops.export.program import export_program
from gdn_ops.export.runner import Package, load_package, read_manifest, verify
from gdn_ops.export.tensorrt import TensorRTExport, build_tensorrt

__all__ = [
    "ExportResult",
    "OnnxExport",
    "Package",
    "ParityError",
    "TensorRTExport",
    "build_tensorrt",
    "export_aoti",
    "export_onnx",
    "export_program",
    "load_package",
    "read_manifest",
    "verify",
]
