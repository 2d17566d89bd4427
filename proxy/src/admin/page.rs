//! The status page: plain HTML that refreshes itself and needs nothing else.

use std::fmt::Write as _;

use crate::status::{Redundancy, ServiceStatus, Status, word};

const STYLE: &str = "body{font:14px/1.5 system-ui,sans-serif;margin:2em;max-width:60em}\
table{border-collapse:collapse;margin:.5em 0 1.5em}\
td,th{text-align:left;padding:.2em 1em .2em 0;border-bottom:1px solid #ddd}\
.protected{color:#176b2c}.degraded,.catching-up{color:#8a5a00}.unprotected{color:#b00020;font-weight:bold}\
@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}td,th{border-color:#333}\
.protected{color:#6fcf85}.degraded,.catching-up{color:#e0b050}.unprotected{color:#ff6b7d}}";

/// The page for `status`.
pub(super) fn render(status: &Status) -> String {
    let mut html = String::new();
    // Writing to a String cannot fail.
    let _ = write_page(&mut html, status);
    html
}

fn write_page(html: &mut String, status: &Status) -> std::fmt::Result {
    let node = escape(&status.node);
    write!(
        html,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta http-equiv=\"refresh\" content=\"2\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{node} - unbroken</title>\
         <style>{STYLE}</style></head><body><h1>{node}</h1>"
    )?;
    let coordinator = &status.coordinator;
    write!(
        html,
        "<p>unbroken {}, up {} s{}{}. Coordinator: {}, zxid {}, {} sessions.</p>",
        escape(&status.version),
        status.uptime_ms / 1000,
        if status.stopping {
            ", <b>stopping</b>"
        } else {
            ""
        },
        if status.maintenance {
            ", <b>in maintenance</b>"
        } else {
            ""
        },
        word(&coordinator.role),
        coordinator.zxid,
        coordinator.sessions
    )?;
    for service in &status.services {
        write_service(html, service)?;
    }
    html.push_str("<p><a href=\"/status.json\">status.json</a> <a href=\"/metrics\">metrics</a></p></body></html>\n");
    Ok(())
}

fn write_service(html: &mut String, service: &ServiceStatus) -> std::fmt::Result {
    let ports: Vec<String> = service.ports.iter().map(u16::to_string).collect();
    write!(html, "<h2>{}</h2><table>", escape(&service.name))?;
    let mut row =
        |name: &str, value: &str| write!(html, "<tr><th>{name}</th><td>{value}</td></tr>");
    row(
        "Address",
        &format!("{} : {}", service.vip, ports.join(", ")),
    )?;
    row("This node", &word(&service.role))?;
    row(
        "Leader",
        &service
            .leader
            .as_deref()
            .map_or_else(|| "-".to_owned(), escape),
    )?;
    let joining = match service.view.joining.as_slice() {
        [] => String::new(),
        names => format!(" (joining: {})", escape(&names.join(", "))),
    };
    row(
        "View",
        &format!(
            "{}: {}{joining}",
            service.view.id,
            escape(&service.view.members.join(", "))
        ),
    )?;
    let redundancy = word(&service.redundancy);
    let reason = match &service.redundancy_reason {
        Some(reason) if service.redundancy != Redundancy::Protected => {
            format!(" - {}", escape(reason))
        }
        _ => String::new(),
    };
    row(
        "Redundancy",
        &format!("<span class=\"{redundancy}\">{redundancy}</span>{reason}"),
    )?;
    row("Connections", &service.connections.to_string())?;
    if let Some(lease) = &service.lease {
        let held = if lease.held { "held" } else { "not held" };
        row("Lease", &format!("{held}, {} ms left", lease.remaining_ms))?;
    }
    if let Some(alarm) = &service.alarm {
        row("Alarm", &escape(alarm))?;
    }
    if let Some(fence) = &service.fence {
        row("Fence", &word(fence))?;
    }
    let counters = &service.counters;
    row(
        "Events",
        &format!(
            "{}, stable to {}",
            counters.last_event, counters.stable_event
        ),
    )?;
    row(
        "Client bytes in / out",
        &format!(
            "{} / {}",
            counters.client_bytes_in, counters.client_bytes_out
        ),
    )?;
    row("Takeovers by this node", &counters.takeovers.to_string())?;
    if let Some(place) = &service.divergence {
        let text = format!("{}, at last on {place}", counters.divergences);
        row("Answers otherwise than the leader's", &text)?;
    }
    html.push_str("</table>");
    if service.members.is_empty() {
        return Ok(());
    }
    html.push_str(
        "<table><tr><th>Member</th><th>State</th><th>Behind</th><th>Last heard</th></tr>",
    );
    for member in &service.members {
        let lag = member
            .lag_events
            .map_or_else(|| "-".to_owned(), |lag| format!("{lag} events"));
        let heard = member
            .last_heard_ms
            .map_or_else(|| "-".to_owned(), |ms| format!("{ms} ms ago"));
        write!(
            html,
            "<tr><td>{}</td><td>{}</td><td>{lag}</td><td>{heard}</td></tr>",
            escape(&member.name),
            word(&member.state)
        )?;
    }
    html.push_str("</table>");
    Ok(())
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
