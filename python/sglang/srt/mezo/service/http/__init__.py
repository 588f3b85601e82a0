"""The routes: OpenAI's, our own, and the page."""
