-- The one spelling of a model's name, as `canonical` in gateway/model_names.py has it: lower case, without a scheme, without
-- Ollama's own host and namespace, without `:local`, always with a tag. Rows keep what was asked for; who sums them up or looks
-- for a model asks this. Steps instead of expressions over the whole name: it is asked for every row. Which letters beyond
-- ASCII have a lower case, the database's locale decides.
CREATE FUNCTION canonical_model(asked text) RETURNS text LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
    plain text := lower(btrim(asked));
    rest  text;
BEGIN
    IF asked = '' THEN
        RETURN '';
    END IF;
    IF strpos(plain, '://') > 0 THEN
        rest := substr(plain, strpos(plain, '://') + 3);
        IF rest <> '' THEN
            plain := rest;
        END IF;
    END IF;
    WHILE right(plain, 6) = ':local' LOOP
        plain := left(plain, -6);
    END LOOP;
    IF starts_with(plain, 'registry.ollama.ai/') THEN
        plain := substr(plain, 20);
    END IF;
    IF starts_with(plain, 'library/') THEN
        plain := substr(plain, 9);
    END IF;
    IF strpos(split_part(reverse(plain), '/', 1), ':') = 0 THEN
        RETURN plain || ':latest';
    END IF;
    RETURN plain;
END
$$;
