"""From an image file and metadata to a prediction, with NumPy, OpenCV, Pillow and onnxruntime alone.

Training preprocesses and encodes with this very code. Every exported bundle carries a copy of the package, so that a
model runs where dualrefnet isn't installed: `python -m runtime image.jpg --metadata '{"age": 61}'`. Modules here
therefore import each other relatively, and nothing else of dualrefnet.
"""
