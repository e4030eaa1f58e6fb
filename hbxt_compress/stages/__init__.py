"""Verbs: one public function a file, from nouns to a noun, each result kept by the store."""
