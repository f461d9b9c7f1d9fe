"""The web service: photographs and forms over HTTP, within limits, many at a time."""
