"""The web service: images and metadata over HTTP, within limits, predicted in batches."""
