"""The page for people, at `/` of the service."""
