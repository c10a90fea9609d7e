"""Answer at the edge, and ask the cloud about doubtful images, encrypted.

    cloud = CloudTail.of_member(Path("clinic-3"), "inference.example.org:8472", ca)
    gate = Gate.fit(logits, features, labels, reference=training_features)
    model = EdgeModel(OnnxBody("edge.onnx"), gate, labels=("normal", "pneumonia"), version="7", cloud=cloud)
    model.shadow_evaluate(images, labels)            # does the cloud help here?
    print(model.answer(image))

Needs numpy and a runtime for the edge model (onnxruntime), not torch; mode `encrypted` needs the extra `he`.
"""

from blindsum.client.inference.cloud_tail import CloudTail, CloudUnavailable, ImplausibleAnswer
from blindsum.client.inference.edge_model import Answer, EdgeModel
from blindsum.client.inference.gate import Gate
from blindsum.client.inference.onnx_body import OnnxBody
from blindsum.client.inference.shadow import Shadow, ShadowReport

__all__ = [
    "Answer",
    "CloudTail",
    "CloudUnavailable",
    "EdgeModel",
    "Gate",
    "ImplausibleAnswer",
    "OnnxBody",
    "Shadow",
    "ShadowReport",
]
