"""From a decoded image and metadata to a prediction, with NumPy, OpenCV and onnxruntime alone.

Training preprocesses and encodes with this very code. Every exported bundle carries a copy of the package, so that a
model runs where dualrefnet isn't installed: `python -m runtime image.jpg --metadata '{"age": 61}'`. Modules here
therefore import each other relatively, and nothing else of dualrefnet.
"""
