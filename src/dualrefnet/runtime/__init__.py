"""From a decoded photograph and a form to an answer, with NumPy, OpenCV and onnxruntime alone.

Training reads pictures and forms with this very code. Every exported bundle carries a copy of the package, so that a model can be used
where dualrefnet isn't installed: `python -m runtime photograph.jpg --form '{"age": 61}'`. So modules here import each other relatively,
and nothing else of dualrefnet.
"""
