"""Training inside SGLang's scheduler."""
