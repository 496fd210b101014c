//! Kubernetes' quantities, such as `100m` and `64Mi`. Pure.

/// Suffixes and their factors (Kubernetes, "Quantity"). A decimal exponent, as in `1e3`, is a suffix too.
const SUFFIXES: [(&str, f64); 16] = [
    ("Ki", 1024.0),
    ("Mi", 1_048_576.0),
    ("Gi", 1_073_741_824.0),
    ("Ti", 1_099_511_627_776.0),
    ("Pi", 1_125_899_906_842_624.0),
    ("Ei", 1_152_921_504_606_846_976.0),
    ("n", 1e-9),
    ("u", 1e-6),
    ("m", 1e-3),
    ("k", 1e3),
    ("M", 1e6),
    ("G", 1e9),
    ("T", 1e12),
    ("P", 1e15),
    ("E", 1e18),
    ("", 1.0),
];

/// Parses an amount that is not negative.
///
/// # Errors
/// The text for the user.
pub fn amount(text: &str) -> Result<f64, String> {
    let digits = text.strip_prefix('+').unwrap_or(text);
    let end = digits.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(digits.len());
    let (number, suffix) = digits.split_at(end);
    let exponent = suffix.strip_prefix(['e', 'E']).and_then(|power| power.parse::<i8>().ok());
    let factor = match exponent {
        Some(power) => Some(10_f64.powi(power.into())),
        None => SUFFIXES.iter().find(|(known, _)| *known == suffix).map(|(_, factor)| *factor),
    };
    let number = number.parse::<f64>().ok();
    number.zip(factor).map(|(number, factor)| number * factor).ok_or_else(|| {
        format!("'{text}' is not a quantity: write 100m or 0.5 for CPU, 64Mi or 1Gi for memory")
    })
}

/// The text, if it is a quantity.
///
/// # Errors
/// The text for the user.
pub fn parse(text: &str) -> Result<String, String> {
    amount(text).map(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, value) in
            [("1", 1.0), ("100m", 0.1), (".5", 0.5), ("1.", 1.0), ("+2k", 2e3), ("1Ki", 1024.0)]
        {
            assert_eq!(amount(text), Ok(value), "{text}");
        }
        assert_eq!((amount("1e3"), amount("2E-1"), amount("1E")), (Ok(1e3), Ok(0.2), Ok(1e18)));
        for text in
            ["", "lots", "m", "1K", "1kb", "1 Mi", "-1", "1e", "1.2.3", "0x1", "inf", "NaN", "1mi", "."]
        {
            assert!(amount(text).is_err(), "{text}");
        }
    }
}
